"""Many trainings, judged. Each command runs train_gpt.py as a process and reads its run folder.

transfer (sizes, coordinates)        does the best learning rate stay over width and depth?
sharpness (trajectories)             does the curvature of the loss follow one curve at every size?
speedrun (tuning, statistics)        which optimizer needs fewer steps to a loss?
report                               the page and the picture of a speedrun
cost_model                           what a step costs on many GPUs, by counting
export                               a run as one script that runs alone
record_book                          the records of records/
runs, processes, run_cost            trainings side by side, none twice, and what they cost
evidence, jobs                       a line for each run, by which a study goes on elsewhere
verdict, parabola, intervals         a minimum, its noise, and words for both
"""
