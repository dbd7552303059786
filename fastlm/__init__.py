"""fastlm: Transformers made smaller and faster, and measured to be so."""
