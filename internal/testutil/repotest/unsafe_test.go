package repotest

import (
	"go/ast"
	"go/token"
	"strings"
	"testing"
)

// unsafe stands only in files that say so in their names, and each conversion has a comment that begins with "Safe:" and
// tells why it holds: on its line, right above its statement, or as part of its function's doc comment.
func TestUnsafe(t *testing.T) {
	conversions := 0
	each(t, func(s *source) {
		for _, imp := range s.syntax.Imports {
			if imp.Path.Value == `"unsafe"` && !strings.HasSuffix(strings.TrimSuffix(unsuffixed(s.name), "_test"), "_unsafe") {
				t.Errorf("%s: unsafe is for files named *_unsafe.go", line(imp.Pos()))
			}
		}
		for _, use := range unsafeUses(s.syntax) {
			conversions++
			if !use.safe {
				t.Errorf("%s: no \"// Safe:\" comment for this conversion", line(use.pos))
			}
		}
	})
	if conversions == 0 {
		t.Error("no use of unsafe found: the search is broken")
	}
}

// unsuffixed strips .go and the suffixes of build constraints: map_unsafe_linux_arm64.go -> map_unsafe.
func unsuffixed(name string) string {
	name = strings.TrimSuffix(name, ".go")
	test := strings.HasSuffix(name, "_test")
	name = strings.TrimSuffix(name, "_test")
	for _, suffix := range []string{"_amd64", "_arm64", "_linux", "_darwin", "_windows", "_unix", "_other"} {
		name = strings.TrimSuffix(name, suffix)
	}
	if test {
		name += "_test"
	}
	return name
}

type unsafeUse struct {
	pos  token.Pos
	safe bool
}

// unsafeUses finds the calls and conversions of package unsafe that can break memory; sizes and offsets cannot.
func unsafeUses(f *ast.File) []unsafeUse {
	lineOf := func(p token.Pos) int { return fset.Position(p).Line }
	explained := map[int]bool{} // lines that a Safe: comment covers
	for _, group := range f.Comments {
		for _, c := range group.List {
			if strings.Contains(c.Text, "Safe:") {
				explained[lineOf(c.Pos())] = true
				explained[lineOf(group.End())+1] = true // the statement below the comment's last line
			}
		}
	}
	var uses []unsafeUse
	var stack []ast.Node
	ast.Inspect(f, func(n ast.Node) bool {
		if n == nil {
			stack = stack[:len(stack)-1]
			return true
		}
		stack = append(stack, n)
		call, ok := n.(*ast.CallExpr)
		if !ok || !convertsUnsafely(call) {
			return true
		}
		if onlyNumber(stack) {
			return true
		}
		use := unsafeUse{pos: call.Pos(), safe: explained[lineOf(call.Pos())] || explained[lineOf(call.End())]}
		// A pointer that is only made untyped is judged where it gets a type again: somewhere in the same function.
		_, converted := stack[len(stack)-2].(*ast.CallExpr)
		converted = converted || call.Fun.(*ast.SelectorExpr).Sel.Name != "Pointer"
		for _, outer := range stack {
			switch o := outer.(type) {
			case *ast.FuncDecl:
				use.safe = use.safe || o.Doc != nil && strings.Contains(o.Doc.Text(), "Safe:")
				for l := lineOf(o.Pos()); !converted && !use.safe && l <= lineOf(o.End()); l++ {
					use.safe = explained[l]
				}
			case *ast.BlockStmt, *ast.File, *ast.IfStmt, *ast.ForStmt, *ast.FuncLit:
			case ast.Stmt, *ast.GenDecl, *ast.ValueSpec:
				use.safe = use.safe || explained[lineOf(o.Pos())]
			}
		}
		if use.safe { // the comment covers a run of adjacent lines
			explained[lineOf(call.End())+1] = true
		}
		uses = append(uses, use)
		return true
	})
	return uses
}

// onlyNumber reports whether the innermost of nested nodes serves to take an address as a number: uintptr(unsafe.Pointer(p)).
func onlyNumber(stack []ast.Node) bool {
	for i := len(stack) - 2; i >= 0; i-- {
		call, ok := stack[i].(*ast.CallExpr)
		if !ok {
			return false
		}
		if id, ok := call.Fun.(*ast.Ident); ok {
			return id.Name == "uintptr"
		}
	}
	return false
}

func convertsUnsafely(call *ast.CallExpr) bool {
	sel, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	pkg, ok := sel.X.(*ast.Ident)
	if !ok || pkg.Name != "unsafe" {
		return false
	}
	switch sel.Sel.Name {
	case "Sizeof", "Alignof", "Offsetof":
		return false
	}
	return true
}
