"""Sources: one module for each kind of records, from every supported data set."""
