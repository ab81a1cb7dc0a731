"""Real kills, signals, faults and damage. LONG_TESTS=1 (`make reliability`) tests more of each."""
