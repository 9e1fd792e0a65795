"""Trackers: TensorBoard, MLflow, Weights & Biases and Trackio, fed from the files of a run."""
