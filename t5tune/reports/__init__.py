"""The HTML pages that t5tune writes: run/report.html, and what inspect --html shows of a token cache."""
