"""What is measured of a pipeline, by which protocol, and how it is reported."""
