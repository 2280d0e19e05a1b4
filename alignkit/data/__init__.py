"""Files and hub data sets → groups → batches."""
