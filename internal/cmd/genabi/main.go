// Command genabi writes package internal/abi: the structs and numbers that the kernel's RDMA interface and a user of it
// share, as Go. It asks the C compiler rather than reading the headers itself: a C file that includes them and uses every
// struct of a table (table.go) is compiled, and names, offsets and sizes are read from the debugging information.
//
//	go generate ./internal/abi
//
// It needs Debian's gcc and linux-libc-dev. Structs must be laid out alike on all systems that Go code is generated for.
// That is checked for arm64 too where its compiler is found (gcc-aarch64-linux-gnu, linux-libc-dev-arm64-cross), and everywhere that
// each struct is laid out by the rule which both have in common (natural), so that one compiler's word goes for both. Each
// compiler's answer is also kept as a text, testdata/layout_GOARCH.txt, with which the tests of internal/abi compare the
// Go types: they need no C compiler.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"path/filepath"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("genabi: ")
	out := flag.String("o", ".", "folder of the package to write")
	include := flag.String("include", "/usr/include", "folder that holds the kernel's headers")
	flag.Parse()
	files, err := generate(*include)
	if err != nil {
		log.Fatal(err)
	}
	for _, f := range files {
		if f.skipped != nil {
			log.Printf("%s is left as it was: %v", f.name, f.skipped)
			continue
		}
		name := filepath.Join(*out, f.name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			log.Fatal(err)
		}
		if err := os.WriteFile(name, f.text, 0o644); err != nil {
			log.Fatal(err)
		}
	}
}

// output is one generated file.
type output struct {
	name    string // relative to the package's folder, with slashes
	text    []byte
	skipped error // why no compiler has said the text: one that is not here. The text is what another architecture's compiler says
}

// generate makes all files from the headers below include.
func generate(include string) ([]output, error) {
	version, err := headerVersion(include)
	if err != nil {
		return nil, err
	}
	var first *layout
	golden := make([]output, 0, len(arches))
	for _, arch := range arches {
		name := "testdata/layout_" + arch.goarch + ".txt"
		cc, err := compilerFor(arch, include)
		if errors.Is(err, errNoCompiler) {
			golden = append(golden, output{name: name, skipped: err})
			continue
		}
		if err != nil {
			return nil, err
		}
		l, err := readLayout(cc, include)
		if err != nil {
			return nil, fmt.Errorf("for %s: %w", arch.goarch, err)
		}
		if first == nil {
			first = l
		} else if err := first.sameAs(l); err != nil {
			return nil, fmt.Errorf("%s differs from the architecture before: %w", arch.goarch, err)
		}
		golden = append(golden, output{name: name, text: goldenText(l, arch, version)})
	}
	if first == nil {
		return nil, fmt.Errorf("%w for any architecture", errNoCompiler)
	}
	for i := range golden {
		if golden[i].skipped != nil {
			golden[i].text = goldenText(first, arches[i], version)
		}
	}
	files, err := goFiles(first, version)
	return append(files, golden...), err
}

// sameAs says where two layouts differ. Constants and types count as much as offsets: the Go code is written once.
func (l *layout) sameAs(m *layout) error {
	a, err := goFiles(l, "")
	if err != nil {
		return err
	}
	b, err := goFiles(m, "")
	if err != nil {
		return err
	}
	for i := range a {
		if !bytes.Equal(a[i].text, b[i].text) {
			return fmt.Errorf("%s would become another file:\n%s", a[i].name, firstDifference(a[i].text, b[i].text))
		}
	}
	x, y := layoutLines(l), layoutLines(m)
	if !bytes.Equal(x, y) {
		return fmt.Errorf("layout:\n%s", firstDifference(x, y))
	}
	return nil
}

func firstDifference(a, b []byte) string {
	x, y := bytes.Split(a, []byte("\n")), bytes.Split(b, []byte("\n"))
	for i := range min(len(x), len(y)) {
		if !bytes.Equal(x[i], y[i]) {
			return fmt.Sprintf("line %d: %q\nand:     %q", i+1, x[i], y[i])
		}
	}
	return fmt.Sprintf("%d lines and %d lines", len(x), len(y))
}
