package repotest

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/transport"
)

func Example() {
	ctx := context.Background()
	l, err := transport.Listen(ctx, "127.0.0.1:0", nil) // peers meet over TCP, and talk over verbs
	check(err)
	go func() {
		c, err := transport.Dial(ctx, l.Addr().String(), nil) // usually in another process
		check(err)
		check(c.Send(ctx, []byte("hello")))
		check(c.Close())
	}()
	c, err := l.Accept(ctx)
	check(err)
	check(c.Recv(ctx, func(m *transport.Message) error { // m lies in registered memory, and is lent for the call
		fmt.Printf("%s, by %s\n", m.Bytes(), c.Path().Rung)
		return nil
	}))
	check(c.Close()) // each connection, also one that its peer has closed
	check(l.Close())
	// Output: hello, by inproc
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// What the README's program opens it closes: others copy it.
func TestExampleLeavesNothing(t *testing.T) {
	testutil.CheckLeaks(t)
	Example()
}

// The README's program is the Example above, so it compiles and does what it says.
func TestReadmeProgram(t *testing.T) {
	readme, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(readme), "```go\n")
	program, _, ok2 := strings.Cut(rest, "```")
	if !ok || !ok2 {
		t.Fatal("README.md has no block of Go")
	}
	self, err := os.ReadFile("readme_test.go")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ = strings.Cut(string(self), "func Example() {\n")
	body, _, ok := strings.Cut(rest, "\t// Output:")
	if !ok {
		t.Fatal("Example not found")
	}
	var want strings.Builder
	for line := range strings.Lines(body) {
		want.WriteString(strings.TrimPrefix(line, "\t"))
	}
	if program != want.String() {
		t.Errorf("README.md's program differs from Example in readme_test.go, which is:\n%s", &want)
	}
}
