"""Real kills, signals, faults and damages. T5TUNE_LONG=1 (`make reliability`) does more of each."""
