"""A local web page on which a pipeline can be tried."""
