"""Where did the accuracy go? Errors of every site, their effect on the output, and changes that were tried."""
