"""Every method of PEFT that changes layers, by its config class and fields."""
