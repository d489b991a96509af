"""A suite of tests of how a language model uses a long context.

  prose       ordinary text of any length, as token ids
  examples    context, question and answer: one test as token ids
  generators  the tests: needle, copy, key_value, multi_needle, position
  reader      reads a context into a decode state, compresses that, and answers from it
  run_checks  runs that cannot read such texts are refused
  suite       the contexts of a command, read one after the other; each has a file once it is finished
  scores      shares, nats, chance levels and intervals
  page        the table, the picture and the page
  command     python -m experiments.tasks longcontext
"""
