"""Pages and charts that show an evaluation or a data set."""
