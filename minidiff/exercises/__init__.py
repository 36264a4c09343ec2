"""Learn by writing it: stubs of the library's functions, and a grader that says what is wrong."""
