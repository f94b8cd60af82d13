"""Pages of one file that need nothing else: style, plots as SVG, tables a reader can sort; report.html, and for studies too."""
