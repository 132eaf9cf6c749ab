package transport

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

// tcpListener listens on soft0, for connections by TCP.
func tcpListener(t *testing.T, cfg Config) *Listener {
	t.Helper()
	cfg.Device = "soft0"
	t.Setenv("RINGSIDE_PATH", "") // cfg decides
	l, err := Listen(t.Context(), "127.0.0.1:0", &cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// say sends a frame to l on a connection of its own.
func say(t *testing.T, l *Listener, kind bootKind, body []byte) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(testutil.Patience))
	if _, err := c.Write(appendFrame(nil, kind, body)); err != nil {
		t.Fatal(err)
	}
	return c
}

// aHello is a dialler's that says so much of paths.
func aHello(features uint64) []byte {
	h := sampleHello()
	h.Features, h.HostID, h.GID[0] = features, thisHost().ID, 0xfd
	return h.append(nil)
}

func refusal(t *testing.T, err error, code HandshakeCode, text string) {
	t.Helper()
	var he *HandshakeError
	if !errors.As(err, &he) || he.Code != code || !strings.Contains(err.Error(), text) {
		t.Errorf("%v; want code %v and %q", err, code, text)
	}
}

// A dialler that does not know of TCP is refused as it was before there was that, and is sent nothing that it does not know.
func TestDiallerWithoutTCP(t *testing.T) {
	l := tcpListener(t, Config{Path: PathTCP})
	_, err := readFrame(say(t, l, bootHello, aHello(0)), bootAccept)
	refusal(t, err, RefusedUnreachable, "TCP is wanted (Config.Path), and not offered by both sides")
	l = tcpListener(t, Config{})
	_, err = readFrame(say(t, l, bootHello, aHello(0)), bootAccept) // its GID is nobody's
	refusal(t, err, RefusedUnreachable, "cannot reach the peer's GID")
}

// A listener that does not know of TCP ignores the offer, and the wish is refused here.
func TestListenerWithoutTCP(t *testing.T) {
	for name, c := range map[string]struct {
		features uint64
		path     Path
		code     HandshakeCode
		text     string
	}{
		"ignores it":         {0, PathTCP, RefusedUnreachable, "TCP is wanted (Config.Path), and the listener does not offer it"},
		"chooses it unasked": {featureTCP | featureViaTCP | featureStream, PathUDP, RefusedUnreachable, "the listener wants TCP, and this side does not offer it"},
		"has no token":       {featureTCP | featureViaTCP, PathTCP, RefusedProtocol, "has no token for it"},
	} {
		n, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		told := make(chan string, 1)
		go func() {
			peer, err := n.Accept()
			if err != nil {
				return
			}
			defer peer.Close()
			peer.SetDeadline(time.Now().Add(testutil.Patience))
			readFrame(peer, bootHello)
			peer.Write(appendFrame(nil, bootAccept, aHello(c.features)))
			_, err = readFrame(peer, bootReady)
			told <- err.Error()
		}()
		_, err = Dial(t.Context(), n.Addr().String(), &Config{Device: "soft0", Path: c.path})
		if t.Run(name, func(t *testing.T) { refusal(t, err, c.code, c.text) }); !strings.Contains(<-told, c.text) {
			t.Errorf("%s: the listener is not told", name)
		}
		n.Close()
	}
}

// The connection for the queue pairs is taken once, if it comes; otherwise the handshake ends.
func TestStreamComesOnce(t *testing.T) {
	var l *Listener
	var boot net.Conn
	var body []byte
	for limit := 500 * time.Millisecond; body == nil; limit *= 4 { // it is for the answer, too, which a busy machine may take longer for
		l = tcpListener(t, Config{HandshakeTimeout: limit})
		boot = say(t, l, bootHello, aHello(featureTCP|featureViaTCP))
		var err error
		if body, err = readFrame(boot, bootAccept); err != nil && limit > testutil.Patience {
			t.Fatal(err)
		}
	}
	h, err := parseHello(body)
	if err != nil || h.Features&featureStream == 0 || h.Stream == (streamToken{}) {
		t.Fatalf("%v, %+v", err, h)
	}
	_, err = readFrame(boot, bootReady)
	refusal(t, err, RefusedTimeout, "did not come in time")
	_, err = readFrame(say(t, l, bootStream, h.Stream[:]), bootReady) // too late
	refusal(t, err, RefusedUnreachable, "no handshake here waits")

	l = tcpListener(t, Config{})
	boot = say(t, l, bootHello, aHello(featureTCP|featureViaTCP))
	if body, err = readFrame(boot, bootAccept); err != nil {
		t.Fatal(err)
	}
	if h, err = parseHello(body); err != nil {
		t.Fatal(err)
	}
	stream := say(t, l, bootStream, h.Stream[:])
	if _, err := readFrame(stream, bootReady); err != nil {
		t.Fatal(err)
	}
	if _, err := readFrame(boot, bootReady); err != nil {
		t.Fatal(err)
	}
	_, err = readFrame(say(t, l, bootStream, h.Stream[:]), bootReady)
	refusal(t, err, RefusedUnreachable, "no handshake here waits")

	// What is no packet ends the connection, and the reason is told to both.
	boot.Write(appendFrame(nil, bootReady, nil))
	c, err := l.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if p := c.Path(); p.Rung != "tcp" {
		t.Errorf("path %v", p)
	}
	stream.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
	if err := c.Recv(t.Context(), func(*Message) error { return nil }); err == nil {
		t.Error("a message has come")
	}
	_, reason, err := readGoodbye(boot)
	if err != nil || !strings.Contains(reason, "broke the protocol") || !strings.Contains(reason, "no packet") {
		t.Errorf("goodbye %q, %v", reason, err)
	}
	<-c.Done()
	if err := c.Err(); !strings.Contains(err.Error(), "broke the protocol") {
		t.Errorf("ended with %v", err)
	}
	if b, err := io.ReadAll(stream); len(b) > 0 && binary.LittleEndian.Uint16(b[2:]) != 0x5352 {
		t.Errorf("% x, %v came on the stream", b, err)
	}
}

// A listener that is closed does not wait for connections that are to come.
func TestCloseBeforeStream(t *testing.T) {
	l := tcpListener(t, Config{HandshakeTimeout: time.Hour})
	boot := say(t, l, bootHello, aHello(featureTCP|featureViaTCP))
	if _, err := readFrame(boot, bootAccept); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// Who gives up while the second connection is being made is told so.
func TestDialCanceledBeforeStream(t *testing.T) {
	n, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for i := range 2 {
			c, err := n.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
			if i == 0 {
				readFrame(c, bootHello)
				c.Write(appendFrame(nil, bootAccept, aHello(featureTCP|featureViaTCP|featureStream)))
			} else { // which it does not answer
				readFrame(c, bootStream)
				cancel()
			}
		}
	}()
	if _, err := Dial(ctx, n.Addr().String(), &Config{Device: "soft0", Path: PathTCP, HandshakeTimeout: time.Hour}); !errors.Is(err, context.Canceled) {
		t.Errorf("Dial: %v", err)
	}
}
