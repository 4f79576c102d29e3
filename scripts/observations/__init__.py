"""What the papers observe of parts of models, looked up in the records of probes; for `probe_sst2.py`."""
