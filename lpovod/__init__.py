"""LP-OVOD, open-vocabulary object detection by linear probing, as a library of stages."""

__version__ = "0.1.0"
