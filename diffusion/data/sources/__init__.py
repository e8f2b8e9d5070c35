"""Sources of pictures, named by URI: one module for each kind."""
