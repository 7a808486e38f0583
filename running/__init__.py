"""What every training program has, kept apart from the method: files of weights (checkpoints.py),
processes and devices (ranks.py), the run folder (folder.py) and an optimizer (muon.py). Beside them
local_server.py serves the page of app.py."""
