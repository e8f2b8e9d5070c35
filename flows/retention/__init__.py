"""What may go: versions of data sets, runs, prints and files that nothing needs any more, and what keeps the rest."""
