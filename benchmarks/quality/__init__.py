"""Does a fleet's basis help, when, and by how much? Leave-one-task-out on real texts and images; see README.md."""
