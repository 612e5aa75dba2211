"""Data sets, each a TensorFlow Datasets builder that needs neither TensorFlow nor a network."""
