package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

var errNoCompiler = errors.New("no C compiler")

// arch is a system that layouts are proven on. triplet is how Debian names it: in the compiler's name, and in the folder
// of the headers that differ between architectures.
type arch struct{ goarch, triplet, packages string }

var arches = []arch{
	{"amd64", "x86_64-linux-gnu", "gcc-x86-64-linux-gnu linux-libc-dev-amd64-cross"},
	{"arm64", "aarch64-linux-gnu", "gcc-aarch64-linux-gnu linux-libc-dev-arm64-cross"},
}

// compiler is a C compiler for arch.
type compiler struct {
	arch
	command string
}

// compilerFor finds the cross compiler, or the machine's own if that makes code for the architecture. Without the kernel's
// headers of the architecture, which are in a package of their own, it is none.
func compilerFor(a arch, include string) (*compiler, error) {
	command, err := exec.LookPath(a.triplet + "-gcc")
	if err != nil {
		if command, err = exec.LookPath("gcc"); err == nil {
			out, failed := exec.Command(command, "-dumpmachine").Output()
			if failed != nil {
				return nil, fmt.Errorf("%s -dumpmachine: %w", command, failed)
			}
			if strings.TrimSpace(string(out)) != a.triplet {
				err = exec.ErrNotFound
			}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s-gcc is not here (apt-get install %s)", errNoCompiler, a.triplet, a.packages)
	}
	for _, dir := range a.headers(include) {
		if _, err := os.Stat(filepath.Join(dir, "asm", "types.h")); err == nil {
			return &compiler{a, command}, nil
		}
	}
	return nil, fmt.Errorf("%w with the kernel's headers for %s (apt-get install %s)", errNoCompiler, a.goarch, a.packages)
}

// headers is where the native package and the cross package have the headers of the architecture.
func (a arch) headers(include string) []string {
	return []string{filepath.Join(include, a.triplet), filepath.Join("/usr", a.triplet, "include")}
}

// run calls the compiler on a C file. The C library's headers stay out: they have opinions of their own on what a
// sockaddr_in is. The kernel's headers are those of include for every architecture, and only asm/ differs: it is found
// where the native package or the cross package has it.
func (c *compiler) run(include string, args ...string) ([]byte, error) {
	base := []string{"-std=gnu11", "-O0", "-nostdinc", "-isystem", include}
	for _, dir := range c.headers(include) {
		base = append(base, "-isystem", dir)
	}
	cmd := exec.Command(c.command, append(base, args...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, &stderr)
	}
	return out, nil
}

// headerVersion returns the version of the kernel that the headers below include are from, as "6.1.187".
func headerVersion(include string) (string, error) {
	name := filepath.Join(include, "linux", "version.h")
	text, err := os.ReadFile(name)
	if err != nil {
		return "", fmt.Errorf("%w (apt-get install linux-libc-dev)", err)
	}
	var parts []string
	for _, part := range []string{"MAJOR", "PATCHLEVEL", "SUBLEVEL"} { // LINUX_VERSION_CODE has no sublevels above 255
		m := regexp.MustCompile(`#define\s+LINUX_VERSION_` + part + `\s+(\d+)`).FindSubmatch(text)
		if m == nil {
			return "", fmt.Errorf("%s: no LINUX_VERSION_%s", name, part)
		}
		parts = append(parts, string(m[1]))
	}
	return strings.Join(parts, "."), nil
}

// macro is a #define without parameters.
type macro struct {
	name, header string
	hex          bool // written in hexadecimal, or with more than a number
}

// alignName and macroName are the enumerators by which the C file passes on what is no type of its own.
func alignName(c string) string { return "genabi_align_" + c }
func macroName(c string) string { return "genabi_macro_" + c }

// includes is the head of the C file.
func includes() []byte {
	var b bytes.Buffer
	for _, f := range wanted {
		for _, h := range f.headers {
			fmt.Fprintf(&b, "#include <%s>\n", h)
		}
	}
	return b.Bytes()
}

// program is the C file that shows all that is wanted. A struct that the headers lack does not compile.
func program(macros []macro) []byte {
	b := bytes.NewBuffer(includes())
	for i, s := range structs() {
		fmt.Fprintf(b, "struct %s genabi_%d;\n", s.c, i)
		fmt.Fprintf(b, "enum { %s = _Alignof(struct %s) };\n", alignName(s.c), s.c)
	}
	for _, m := range macros {
		fmt.Fprintf(b, "enum { %s = (%s) };\n", macroName(m.name), m.name)
	}
	return b.Bytes()
}

var (
	lineMarker = regexp.MustCompile(`^# \d+ "([^"]*)"`)
	define     = regexp.MustCompile(`^#define (\w+) (.*)$`)
	decimal    = regexp.MustCompile(`^\d+$|sizeof`)
)

// readMacros finds the macros that are wanted. The preprocessor, asked with -dD, leaves the #defines where they stood,
// so each one's header is known. Texts are left out, and so are include guards, which have no value.
func readMacros(preprocessed []byte, include string) []macro {
	var macros []macro
	header := ""
	seen := map[string]bool{}
	for s := bufio.NewScanner(bytes.NewReader(preprocessed)); s.Scan(); {
		text := s.Text()
		if m := lineMarker.FindStringSubmatch(text); m != nil {
			header = relative(m[1], include)
			continue
		}
		m := define.FindStringSubmatch(text)
		if m == nil {
			continue
		}
		name, value := m[1], strings.TrimSpace(m[2])
		if value == "" || value[0] == '"' || seen[name] || fileOf(header, name) == nil {
			continue
		}
		seen[name] = true
		macros = append(macros, macro{name, header, !decimal.MatchString(value)})
	}
	return macros
}

// relative is a header's name as it is included; elsewhere's names stay.
func relative(name, include string) string {
	if rel, err := filepath.Rel(include, name); err == nil && filepath.IsLocal(rel) {
		return filepath.ToSlash(rel)
	}
	return name
}

// compile returns the object file of the program, and the macros in it.
func (c *compiler) compile(include string) ([]byte, []macro, error) {
	dir, err := os.MkdirTemp("", "genabi")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(dir)
	source, object := filepath.Join(dir, "abi.c"), filepath.Join(dir, "abi.o")

	if err := os.WriteFile(source, includes(), 0o600); err != nil {
		return nil, nil, err
	}
	text, err := c.run(include, "-E", "-dD", source)
	if err != nil {
		return nil, nil, err
	}
	macros := readMacros(text, include)
	if err := os.WriteFile(source, program(macros), 0o600); err != nil {
		return nil, nil, err
	}
	// Enums have no variables, and would be left out of the debugging information as unused.
	if _, err := c.run(include, "-gdwarf-4", "-fno-eliminate-unused-debug-types", "-c", "-o", object, source); err != nil {
		return nil, nil, err
	}
	o, err := os.ReadFile(object)
	return o, macros, err
}
