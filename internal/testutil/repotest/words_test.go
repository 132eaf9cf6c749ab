package repotest

import (
	"bytes"
	"go/ast"
	"go/format"
	"go/token"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func TestFormatted(t *testing.T) {
	each(t, func(s *source) {
		want, err := format.Source(s.text)
		if err != nil {
			t.Errorf("%s: %v", s.name, err)
		} else if !bytes.Equal(want, s.text) {
			t.Errorf("%s: gofmt would change it", s.name)
		}
	})
}

var unfinished = regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME|XX` + `X)\b`)

func TestNothingLeftForLater(t *testing.T) {
	each(t, func(s *source) {
		for _, group := range s.syntax.Comments {
			for _, c := range group.List {
				if w := unfinished.FindString(c.Text); w != "" {
					t.Errorf("%s: %s: do it, or say what is missing and why", line(c.Pos()), w)
				}
			}
		}
	})
}

// A file is one idea: past 700 lines it deserves a look, past 1200 (tests: 1500) it has become several.
func TestFileLength(t *testing.T) {
	each(t, func(s *source) {
		n := bytes.Count(s.text, []byte("\n"))
		limit := 1200
		if s.isTest() {
			limit = 1500
		}
		switch {
		case ast.IsGenerated(s.syntax):
		case n > limit:
			t.Errorf("%s has %d lines: split it by what it does", s.name, n)
		case n > 700:
			t.Logf("%s has %d lines", s.name, n)
		}
	})
}

func TestPackagesHaveDocs(t *testing.T) {
	documented := map[string]bool{}
	each(t, func(s *source) {
		if s.isTest() {
			return
		}
		documented[s.folder] = documented[s.folder] || s.syntax.Doc != nil
	})
	for folder, ok := range documented {
		if !ok {
			t.Errorf("%s: no file has a package comment", folder)
		}
	}
}

// selfExplaining are methods whose contract is that of a well-known interface.
var selfExplaining = map[string]bool{
	"String": true, "Error": true, "Unwrap": true, "Is": true, "As": true, "Timeout": true, "Temporary": true, "Format": true,
	"MarshalBinary": true, "UnmarshalBinary": true, "AppendBinary": true, "MarshalText": true, "UnmarshalText": true,
	"MarshalJSON": true, "UnmarshalJSON": true, "Len": true, "Less": true, "Swap": true, "Close": true, "LogValue": true,
	"GoString": true, "AppendText": true,
}

// Exported symbols of the public packages have doc comments. A group of constants of one type shares the type's.
func TestExportedSymbolsHaveDocs(t *testing.T) {
	each(t, func(s *source) {
		if s.isTest() || ast.IsGenerated(s.syntax) || s.syntax.Name.Name == "main" || strings.Contains(s.folder+"/", "internal/") {
			return
		}
		for _, d := range s.syntax.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Doc == nil && d.Name.IsExported() && exportedReceiver(d) && (d.Recv == nil || !selfExplaining[d.Name.Name]) {
					t.Errorf("%s: %s has no doc comment", line(d.Pos()), d.Name.Name)
				}
			case *ast.GenDecl:
				for _, name := range undocumented(d) {
					t.Errorf("%s: %s has no doc comment", line(name.Pos()), name.Name)
				}
			}
		}
	})
}

func exportedReceiver(d *ast.FuncDecl) bool {
	if d.Recv == nil {
		return true
	}
	typ := d.Recv.List[0].Type
	for {
		switch x := typ.(type) {
		case *ast.StarExpr:
			typ = x.X
		case *ast.IndexExpr:
			typ = x.X
		case *ast.IndexListExpr:
			typ = x.X
		case *ast.Ident:
			return x.IsExported()
		default:
			return false
		}
	}
}

func undocumented(d *ast.GenDecl) (names []*ast.Ident) {
	if d.Tok == token.IMPORT || d.Doc != nil && (d.Tok != token.TYPE || !d.Lparen.IsValid()) {
		return nil
	}
	for _, spec := range d.Specs {
		switch spec := spec.(type) {
		case *ast.TypeSpec:
			if spec.Name.IsExported() && spec.Doc == nil {
				names = append(names, spec.Name)
			}
		case *ast.ValueSpec:
			if d.Tok == token.CONST && spec.Type != nil && d.Lparen.IsValid() {
				return names // values of a named type
			}
			for _, n := range spec.Names {
				if n.IsExported() && spec.Doc == nil && spec.Comment == nil {
					names = append(names, n)
				}
			}
		}
	}
	return names
}

var link = regexp.MustCompile(`\]\(([^)#\s]+)(#[^)]*)?\)`)

// Links between the project's documents lead somewhere, and nothing is left for later there either.
func TestDocuments(t *testing.T) {
	err := walk(func(name string) error {
		if path.Ext(name) != ".md" {
			return nil
		}
		text, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			return err
		}
		for _, m := range link.FindAllSubmatch(text, -1) {
			to := string(m[1])
			if strings.Contains(to, "://") || strings.HasPrefix(to, "mailto:") {
				continue
			}
			if _, err := os.Stat(filepath.Join(root, path.Dir(name), to)); err != nil {
				t.Errorf("%s: link to %s, which is not there", name, to)
			}
		}
		if w := unfinished.Find(text); w != nil {
			t.Errorf("%s: %s", name, w)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
