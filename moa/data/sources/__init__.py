"""Photos of a folder, of tar shards, of a data set or of FastComposer's archive → raw shards."""
