"""Images with labels: from folders, tables, shards and arrays to `Split`; decoded once."""
