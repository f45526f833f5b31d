"""What a person looks at: one self-contained page per run, and the table at the end of a run."""
