"""What the scripts of data_prep/ share: votes into prompts, published data sets, counts."""
