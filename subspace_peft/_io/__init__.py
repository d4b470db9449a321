"""Files: written aside and renamed, hashed, and checked before their content is used."""
