package abi

import (
	"encoding/binary"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

// namedType and namedOffset are the entries of the generated lists (types_test.go).
type namedType struct {
	c string // the tag in C, or for an anonymous struct the way to it
	t reflect.Type
}

type namedOffset struct {
	c      string
	offset int
}

// golden returns the lines that the C compiler of an architecture gave. The last part of a field's name is reduced to
// what C's spelling and Go's have in common.
func golden(t *testing.T, goarch string) []string {
	text, err := os.ReadFile("testdata/layout_" + goarch + ".txt")
	if errors.Is(err, fs.ErrNotExist) {
		testutil.Skip(t, "no C compiler has been asked about linux/"+goarch)
	}
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "#"):
			continue
		case !strings.HasPrefix(line, "struct ") && !strings.HasPrefix(line, "member "):
			name, rest, _ := strings.Cut(line, " ")
			dot := strings.LastIndexByte(name, '.')
			line = name[:dot+1] + reduced(name[dot+1:]) + " " + rest
		}
		lines = append(lines, line)
	}
	if len(lines) < 500 {
		t.Fatalf("testdata/layout_%s.txt has only %d lines", goarch, len(lines))
	}
	return lines
}

func reduced(name string) string { return strings.ToLower(strings.ReplaceAll(name, "_", "")) }

// lines says of the Go types what golden says of the C structs.
func lines() []string {
	var all []string
	for _, s := range types {
		all = append(all, fmt.Sprintf("struct %s size %d align %d", s.c, s.t.Size(), s.t.Align()))
		for i := range s.t.NumField() {
			if f := s.t.Field(i); f.Name != "_" {
				all = append(all, fmt.Sprintf("%s.%s offset %d size %d", s.c, reduced(f.Name), f.Offset, f.Type.Size()))
			}
		}
	}
	for _, o := range offsets {
		all = append(all, fmt.Sprintf("member %s offset %d", o.c, o.offset))
	}
	return all
}

// Size, alignment and every field of every struct are where the C compiler puts them, and there are no others.
func TestLayout(t *testing.T) {
	want, got := golden(t, runtime.GOARCH), lines()
	slices.Sort(want)
	slices.Sort(got)
	for _, l := range want {
		if _, ok := slices.BinarySearch(got, l); !ok {
			t.Errorf("C:  %s", l)
		}
	}
	for _, l := range got {
		if _, ok := slices.BinarySearch(want, l); !ok {
			t.Errorf("Go: %s", l)
		}
	}
}

// The Go code is the same everywhere, so what the C compilers say must be as well.
func TestLayoutsOfArchitecturesAgree(t *testing.T) {
	if a, b := golden(t, "amd64"), golden(t, "arm64"); !slices.Equal(a, b) {
		t.Error("testdata/layout_amd64.txt and testdata/layout_arm64.txt differ")
	}
}

// Padding is spelled out: a struct's bytes are those of its fields, so none of them can hold what was there before.
func TestPaddingIsExplicit(t *testing.T) {
	for _, s := range types {
		if n := binary.Size(reflect.Zero(s.t).Interface()); n != int(s.t.Size()) {
			t.Errorf("%v: %d bytes in fields, %d in all", s.t, n, s.t.Size())
		}
	}
}

// A struct that is not in the list would not be tested. newer.go has a test of its own below.
func TestEveryGeneratedStructIsListed(t *testing.T) {
	listed := map[string]bool{}
	for _, s := range types {
		listed[s.t.Name()] = true
	}
	names, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range names {
		if !strings.HasSuffix(e.Name(), ".go") || strings.HasSuffix(e.Name(), "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), e.Name(), nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		if !ast.IsGenerated(f) {
			continue
		}
		ast.Inspect(f, func(node ast.Node) bool {
			if d, ok := node.(*ast.TypeSpec); ok {
				n++
				if !listed[d.Name.Name] {
					t.Errorf("%s: %s is not in types_test.go", e.Name(), d.Name.Name)
				}
			}
			return true
		})
	}
	if n != len(types) {
		t.Errorf("%d types in the generated files, %d in types_test.go", n, len(types))
	}
}

// The members of newer headers fit into the union that 6.1's have.
func TestNewerMembersFit(t *testing.T) {
	union, ok := reflect.TypeFor[RxeSendWR]().FieldByName("WR")
	if !ok {
		t.Fatal("RxeSendWR has no WR")
	}
	flush := reflect.TypeFor[RxeSendWRFlush]()
	if flush.Size() > union.Type.Size() || flush.Align() > union.Type.Align() {
		t.Errorf("RxeSendWRFlush has size %d, align %d; the union %d, %d", flush.Size(), flush.Align(), union.Type.Size(), union.Type.Align())
	}
	if n := binary.Size(RxeSendWRFlush{}); n != int(flush.Size()) {
		t.Errorf("RxeSendWRFlush: %d bytes in fields, %d in all", n, flush.Size())
	}
	for name, want := range map[string]uintptr{
		"RemoteAddr": RxeSendWRFlushRemoteAddrOffset, "Length": RxeSendWRFlushLengthOffset, "RKey": RxeSendWRFlushRKeyOffset,
		"Type": RxeSendWRFlushTypeOffset, "Level": RxeSendWRFlushLevelOffset,
	} {
		if f, ok := flush.FieldByName(name); !ok || union.Offset+f.Offset != want {
			t.Errorf("RxeSendWRFlush.%s is at %d of RxeSendWR, the constant says %d", name, union.Offset+f.Offset, want)
		}
	}
}
