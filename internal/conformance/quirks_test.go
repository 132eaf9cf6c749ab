package conformance

import (
	"slices"
	"testing"
)

// A gap that names no case hides nothing.
func TestGapsNameCases(t *testing.T) {
	for _, g := range gaps {
		if !slices.ContainsFunc(table, func(tc testCase) bool { return tc.name == g.name }) {
			t.Errorf("%s: no case %q", g.provider, g.name)
		}
	}
}
