"""Questions and images become arrays, on the host: images, text, and the splicing of both."""
