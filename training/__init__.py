"""All that surrounds the loop of train_gpt.py, each file one thing.

config (sections, migrate, synonyms, help)  the settings of a run, and how they are read
runtime (ranks, watchdog)                   processes, device, precision
run, run_folder, resume, checkpoint         a run's start, folder, and what it saves
clock, evaluate, geometry, sharpness        what it measures
summary, provenance, plots                  what it leaves
baseline, optimizer_state                   a torch optimizer, as the loop uses Dualized
published                                   baselines from a library
"""

from . import published  # noqa: F401  # it registers baselines
