"""What a person sees and presses: the console, progress, exit codes, help, signals."""
