"""Pages, plots and tables that people look at.

  report      report.html of a run
  inspect     the page of `experiments.inspect`
  sweep       the table and plot of a sweep
  html        templates (*.html.jinja) and page.css become pages that stand alone
  chunk_html  text cut into colours
  terminal    the same on a terminal
  svg         plots of pages
  pictures    plots that are files, by matplotlib
  tables      numbers, aligned columns, Markdown
"""
