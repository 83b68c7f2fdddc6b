"""The benchmark: models x recipes x bits, resumable, one row a run, tables made from the rows alone."""
