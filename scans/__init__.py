"""Files of scans, and what is done to them before a model sees them.

- volumes.py   one file <-> a `Volume`: reading, writing, slices the same way up, window, sizes
- dicom.py     one DICOM series as a volume; which series a folder holds
- boxes.py     boxes <-> pictures with white outlines (the paper's detection)
- files.py     which file belongs to which: an image's label, the place of an answer
- datasets.py  the table of datasets, each row beside its reader; finding them, splits
- store.py     the prepared store: every case once, as slices that training reads from disk
- uploads.py   files that a browser sends, as the page (app.py) takes them
- doctor.py    what is there and what is wrong with it (`python data.py --data_root ...`)

Each imports only from those above it, but for volumes.py, which reads DICOM through dicom.py.
"""
