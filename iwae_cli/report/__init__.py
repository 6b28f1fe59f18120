"""What is made of finished runs: pictures, tables, pages. Knows numpy and files, not torch."""
