package repotest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

const module = "github.com/ringside-rdma/ringside"

// source is one Go file. Folders are relative to the repository's root, with slashes; "." is the root.
type source struct {
	name   string // repository path
	folder string
	text   []byte
	syntax *ast.File
}

func (s *source) isTest() bool { return strings.HasSuffix(s.name, "_test.go") }

var fset = token.NewFileSet()

// line is where a node stands, as file:line.
func line(p token.Pos) string {
	at := fset.Position(p)
	return at.Filename + ":" + itoa(at.Line)
}

func itoa(n int) string {
	if n < 10 {
		return string(rune('0' + n))
	}
	return itoa(n/10) + itoa(n%10)
}

func under(folder, parent string) bool {
	return folder == parent || strings.HasPrefix(folder, parent+"/")
}

// root is the repository's root: the folder of go.mod, above this package.
const root = "../../.."

// files returns every Go file of the repository, testdata left out.
var files = sync.OnceValues(func() ([]*source, error) {
	var all []*source
	err := walk(func(name string) error {
		if !strings.HasSuffix(name, ".go") {
			return nil
		}
		text, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(fset, name, text, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		all = append(all, &source{name: name, folder: path.Dir(name), text: text, syntax: f})
		return nil
	})
	return all, err
})

// walk calls fn for the repository path of each file that is part of the project.
func walk(fn func(name string) error) error {
	return filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		if d.IsDir() {
			switch base := d.Name(); {
			case rel == ".":
			case rel == "bin", base == "testdata", strings.HasPrefix(base, "."), strings.HasPrefix(base, "_"):
				return fs.SkipDir
			}
			return nil
		}
		return fn(filepath.ToSlash(rel))
	})
}

func each(t *testing.T, fn func(*source)) {
	t.Helper()
	all, err := files()
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 10 {
		t.Fatalf("only %d Go files found under %s: the walk is broken", len(all), root)
	}
	for _, s := range all {
		fn(s)
	}
}
