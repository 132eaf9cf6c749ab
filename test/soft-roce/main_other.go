//go:build !linux

package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "soft-roce: this command builds its virtual machine from Debian packages: run it on Linux")
	os.Exit(125)
}
