"""Which of these configurations reaches a loss sooner? Optimizers side by side, with statistics.

    python -m studies.speedrun dualized.toml adamw.toml --seeds 4 --target 1.52 --budget steps=400
    python -m studies.speedrun dualized.toml adamw.toml --target-entry adamw \\
        --tune "adamw:optim.lr=log(1e-3,1e-2,8)" "dualized:optim.lr=log(1,10,8)"
    python -m studies.speedrun dualized.toml adamw.toml --sigma 0.002 --power 0.005

The last one answers how many seeds that takes. An entry is a configuration, named by its file.
Other options, --section.key value, change every entry, as train_gpt.py takes them. All entries have
the same seeds, and with them the same order of data.

Two things are measured. One is the loss at the end of the budget. The other is the steps to a
target: the shortest horizon (a run with its whole schedule) whose mean end loss over the seeds
passes the rule (target − mean) · √n ≥ threshold. It is never the first crossing on a longer
schedule.

The folder runs/NAME has a run folder for each training, results.json, report.html and report.png.
The same call again resumes a study that was stopped. docs/speedrun.md defines each figure.
"""
