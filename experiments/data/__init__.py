"""Data sets as TensorFlow Datasets builders that need neither TensorFlow nor a network connection."""
