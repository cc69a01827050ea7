"""Files that earlier versions wrote, and the tests that they still load and say what they said."""
