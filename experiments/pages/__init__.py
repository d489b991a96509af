"""Pages, plots and tables that people look at.

  svg             plots as SVG
  report_page     report.html of a run
  inspect_page    the page of `experiments.inspect`
  sweep_page      the table and plot of a sweep
  chunk_html      text cut into colours
  chunk_terminal  the same on a terminal
  text_table      aligned columns
"""
