"""What a mixture chose: values, pictures, the load of its experts."""
