"""`diptych bench`: both engines on stated work, timed by turns, against the limits of the machine and against peers."""
