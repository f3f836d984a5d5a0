"""Flow runs that hold no process while crews work: when they are suspended, what is noted, who brings them back."""
