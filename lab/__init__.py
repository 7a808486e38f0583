"""The laboratory: data, yardsticks and tools around the model. None of it is part of the method.

phantom.py      stand-ins: invented subjects in the native layouts of 19 datasets
anatomy.py      their bodies: tables of organs, how CT, MR and ultrasound show them
synthetic.py    invented anatomies for training, drawn once as a pool of region maps
unet.py         the specialist to compare with, a plain U-Net
bench.py        speed, memory and the cost of a training run
pack.py         a prepared store made small, for a GPU machine without scans
loose_scans.py  nnU-Net folders from the loose real scans
demo.py         the picture of `make demo`
pages.py        the tables of README and docs from the files of docs/results and docs/claims

A program of this package runs by `python -m lab.NAME`.
"""
