"""Files that earlier versions wrote, and the test that they still load with the same numbers."""
