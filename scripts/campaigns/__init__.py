"""What campaigns are made of: arms, their runs, what is noted of each, and training and measuring on SST-2."""
