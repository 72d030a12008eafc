"""The cases of the protocol as data: what is done on a server, and what must come."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.slot import ALL, T

FULL = T + "ALTER TABLE t REPLICA IDENTITY FULL\n"


ONE = T + "INSERT INTO t VALUES (1, 'a')\n"


WIDE = """CREATE TABLE d (id int PRIMARY KEY, v text, n int)
ALTER TABLE d ALTER v SET STORAGE EXTERNAL
INSERT INTO d VALUES (1, repeat('x', 3000), 1)
"""


KEY = """CREATE TABLE p (k text PRIMARY KEY, v text, n int)
ALTER TABLE p ALTER k SET STORAGE EXTERNAL, ALTER v SET STORAGE EXTERNAL
INSERT INTO p VALUES (repeat('k', 2500), repeat('x', 3000), 1)
"""


PARTS = """CREATE TABLE r (id int PRIMARY KEY, v text) PARTITION BY RANGE (id)
CREATE TABLE r1 PARTITION OF r FOR VALUES FROM (0) TO (10)
CREATE TABLE r2 (v text, id int NOT NULL)
ALTER TABLE r ATTACH PARTITION r2 FOR VALUES FROM (10) TO (20)
"""


AB = "CREATE TABLE a (id int PRIMARY KEY)\nCREATE TABLE b (id int PRIMARY KEY, a int REFERENCES a ON DELETE CASCADE)\n"


@dataclass(frozen=True)
class Case:
    """`sql` is committed behind the slot, `before` ahead of it; a line that begins with `!` must be refused."""

    number: str
    sql: str
    expected: str
    before: str = T
    publish: str = ALL
    since: int = 14
    until: int = 99
    names: bool = False
    options: dict[str, str] = field(default_factory=dict)


CASES = [
    # A. Basics
    Case("1", "INSERT INTO t VALUES (1, 'a')", "+t{1,a}"),
    Case("2", "UPDATE t SET v = 'b'", "~t{1,b}", ONE),
    Case("3", "UPDATE t SET id = 2", "~t[K 1]{2,a}", ONE),
    Case("4", "DELETE FROM t", "-t[K 1]", ONE),
    Case("5", "INSERT INTO t VALUES (1, NULL), (2, '')", "+t{1,null} +t{2,''}"),
    Case("8", "BEGIN\nINSERT INTO t VALUES (1, 'a')\nROLLBACK", ""),
    Case(
        "9",
        """BEGIN
        INSERT INTO t VALUES (1, 'a')
        SAVEPOINT x
        INSERT INTO t VALUES (2, 'b')
        ROLLBACK TO x
        INSERT INTO t VALUES (3, 'c')
        COMMIT""",
        "+t{1,a} +t{3,c}",
    ),
    Case("10", "INSERT INTO t VALUES (1, 'a'); DELETE FROM t", "+t{1,a} -t[K 1]"),
    Case("11", "INSERT INTO t SELECT i, 'v' || i FROM generate_series(1, 4) i", "+t{1,v1} +t{2,v2} +t{3,v3} +t{4,v4}"),
    Case(
        "13",
        """INSERT INTO t VALUES (1, 'b') ON CONFLICT (id) DO UPDATE SET v = excluded.v
        INSERT INTO t VALUES (1, 'c') ON CONFLICT DO NOTHING""",
        "~t{1,b}",
        ONE,
    ),
    Case(
        "14",
        """MERGE INTO t USING (VALUES (1), (2)) s(id) ON t.id = s.id
        WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT VALUES (s.id, 'm')""".replace("\n", " "),
        "-t[K 1] +t{2,m}",
        ONE,
        since=15,
    ),
    Case("15", "WITH x AS (DELETE FROM t RETURNING v) INSERT INTO t SELECT 2, v FROM x", "-t[K 1] +t{2,a}", ONE),
    Case("16", "UPDATE t SET v = v", "~t{1,a}", ONE),
    Case("17", "SELECT * FROM t FOR UPDATE", "", ONE),
    Case(
        "18",
        "INSERT INTO a VALUES (1); INSERT INTO t VALUES (1, 'a'); INSERT INTO a VALUES (2)",
        "+a{1} +t{1,a} +a{2}",
        T + AB,
    ),
    Case("19", "DELETE FROM a", "-a[K 1] -b[K 7]", AB + "INSERT INTO a VALUES (1)\nINSERT INTO b VALUES (7, 1)"),
    Case(
        "20",
        "INSERT INTO t VALUES (1, 'a')",
        "+t{1,a} +log{1}",
        T
        + """CREATE TABLE log (id int PRIMARY KEY)
        CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO log VALUES (NEW.id); RETURN NEW; END'
        CREATE TRIGGER g AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION f()""",
    ),
    Case("22", "CREATE TABLE n (id int)\nALTER TABLE n ADD x int\nDROP TABLE n", ""),
    Case(
        "23",
        "INSERT INTO a VALUES (1)\nINSERT INTO t VALUES (1, 'a')",
        "+t{1,a}",
        T + AB,
        "CREATE PUBLICATION p FOR TABLE t",
    ),
    Case("25", "INSERT INTO z DEFAULT VALUES", "+z{}", "CREATE TABLE z ()"),
    Case(
        "26",
        f"""INSERT INTO "we ird""q'x.y;" VALUES (1, 2, 3)
        INSERT INTO {"n" * 63} VALUES (1)""",
        f"""+we ird"q'x.y;{{ä ö:1,{"c" * 63}:2,"":3}} | +{"n" * 63}{{id:1}}""",
        f"""CREATE TABLE "we ird""q'x.y;" ("ä ö" int, {"c" * 63} int, \"""\""" int)
        CREATE TABLE {"n" * 63} (id int)""",
        names=True,
    ),
    Case("28", "INSERT INTO n VALUES (1)", "+n{1}", "CREATE TABLE n (id int)"),
    # B. Replica identity and TOAST
    Case("31", "UPDATE t SET v = 'b'", "~t[O 1,a]{1,b}", FULL + "INSERT INTO t VALUES (1, 'a')"),
    Case("32", "DELETE FROM t", "-t[O 1,a]", FULL + "INSERT INTO t VALUES (1, 'a')"),
    Case("33", "DELETE FROM t", "-t[O 1,null]", FULL + "INSERT INTO t VALUES (1, NULL)"),
    Case(
        "34 35",
        "UPDATE i SET v = 'b'\nUPDATE i SET u = 8\nDELETE FROM i",
        "~i{1,7,b} | ~i[K 7]{1,8,b} | -i[K 8]",
        """CREATE TABLE i (id int PRIMARY KEY, u int NOT NULL, v text)
        CREATE UNIQUE INDEX iu ON i (u)
        ALTER TABLE i REPLICA IDENTITY USING INDEX iu
        INSERT INTO i VALUES (1, 7, 'a')""",
    ),
    Case(
        "36",
        "INSERT INTO n VALUES (1)\n!UPDATE n SET id = 2\n!DELETE FROM n\nINSERT INTO n VALUES (3)",
        "+n{1} | +n{3}",
        "CREATE TABLE n (id int)",
    ),
    Case("37", "UPDATE d SET n = 2", "~d{1,u,2}", WIDE),
    Case("38", "UPDATE d SET n = 2", "~d[O 1,x×3000,1]{1,x×3000,2}", WIDE + "ALTER TABLE d REPLICA IDENTITY FULL"),
    Case(
        "39",
        "UPDATE p SET n = 2",
        "~p[K k×2500]{k×2500,2}",
        KEY + "ALTER TABLE p DROP v",
    ),
    Case("40", "UPDATE p SET n = 2", "~p[K k×2500]{k×2500,u,2}", KEY),
    Case("41", "UPDATE d SET v = repeat('y', 4000)", "~d{1,y×4000,1}", WIDE),
    Case("42", "UPDATE d SET v = NULL", "~d{1,null,1}", WIDE),
    Case(
        "43",
        "UPDATE c SET k1 = 3\nUPDATE c SET v = 'b'\nDELETE FROM c",
        "~c[K 1,2]{3,2,a} | ~c{3,2,b} | -c[K 3,2]",
        "CREATE TABLE c (k1 int, k2 int, v text, PRIMARY KEY (k2, k1))\nINSERT INTO c VALUES (1, 2, 'a')",
    ),
    Case(
        "44",
        "UPDATE t SET v = 'b'\n"
        "ALTER TABLE t REPLICA IDENTITY FULL\n"
        "UPDATE t SET v = 'c'\n"
        "ALTER TABLE t REPLICA IDENTITY DEFAULT\n"
        "DELETE FROM t",
        "~t{1,b} | ~t[O 1,b]{1,c} | -t[K 1]",
        ONE,
    ),
    Case(
        "45",
        "UPDATE t SET id = 2\n"
        "ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (v)\n"
        "UPDATE t SET id = 3\n"
        "DELETE FROM t",
        "~t[K 1]{2,a} | ~t{3,a} | -t[K a]",
        ONE,
    ),
    Case("46", "UPDATE p SET k = repeat('l', 2600)", "~p[K k×2500]{l×2600,u,1}", KEY),
    Case("48", "UPDATE d SET id = 2", "~d[K 1]{2,u,1}", WIDE),
    Case(
        "49",
        "DELETE FROM n",
        "-n[O 1] -n[O 1]",
        "CREATE TABLE n (id int)\nALTER TABLE n REPLICA IDENTITY FULL\nINSERT INTO n VALUES (1), (1)",
    ),
    Case("50", "UPDATE d SET n = 2", "~d{1,short,2}", WIDE + "UPDATE d SET v = 'short'"),
    # C. DDL
    Case(
        "51",
        "INSERT INTO t VALUES (1, 'a'); ALTER TABLE t ADD w int; INSERT INTO t VALUES (2, 'b', 3)",
        "+t{1,a} +t{2,b,3}",
    ),
    Case("52", "ALTER TABLE t ADD w int DEFAULT 42\nUPDATE t SET v = 'b'", "~t{1,b,42}", ONE),
    Case("53", "INSERT INTO t VALUES (1, 'a')\nALTER TABLE t DROP v\nINSERT INTO t VALUES (2)", "+t{1,a} | +t{2}"),
    Case(
        "54",
        "INSERT INTO t VALUES (1, 'a')\nALTER TABLE t RENAME v TO w\nINSERT INTO t VALUES (2, 'b')",
        "+t{id:1,v:a} | +t{id:2,w:b}",
        names=True,
    ),
    Case(
        "55",
        "INSERT INTO c VALUES (1, 'a', 2)\nALTER TABLE c DROP v, ADD v int\nINSERT INTO c VALUES (2, 3, 4)",
        "+c{id:1,v:a,w:2} | +c{id:2,w:3,v:4}",
        "CREATE TABLE c (id int PRIMARY KEY, v text, w int)",
        names=True,
    ),
    Case(
        "56",
        "INSERT INTO a VALUES (1)\nALTER TABLE a ALTER id TYPE text\nINSERT INTO a VALUES ('x')",
        "+a{1} | +a{x}",
        "CREATE TABLE a (id int PRIMARY KEY)",
    ),
    Case(
        "58",
        "INSERT INTO t VALUES (1, 'a')\nALTER TABLE t RENAME TO t2\nINSERT INTO t2 VALUES (2, 'b')",
        "+t{1,a} | +t2{2,b}",
    ),
    Case(
        "59",
        "INSERT INTO t VALUES (1, 'a')\n"
        "CREATE SCHEMA s1\n"
        "ALTER TABLE t SET SCHEMA s1\n"
        "INSERT INTO s1.t VALUES (2, 'b')",
        "+t{1,a} | +s1.t{2,b}",
    ),
    Case(
        "60",
        "INSERT INTO s1.x VALUES (1)\nALTER SCHEMA s1 RENAME TO s2\nINSERT INTO s2.x VALUES (2)",
        "+s1.x{1} | +s2.x{2}",
        "CREATE SCHEMA s1\nCREATE TABLE s1.x (id int)",
        since=16,
    ),
    Case(
        "60",
        "INSERT INTO s1.x VALUES (1)\nALTER SCHEMA s1 RENAME TO s2\nINSERT INTO s2.x VALUES (2)",
        "+s1.x{1} | +s1.x{2}",
        "CREATE SCHEMA s1\nCREATE TABLE s1.x (id int)",
        until=15,
    ),
    Case("61", "INSERT INTO t VALUES (1, 'a')\nUPDATE t SET v = 'b'\nDROP TABLE t", "+t{1,a} | ~t{1,b}"),
    Case(
        "62",
        "INSERT INTO e VALUES ('ok')\nDROP TABLE e\nDROP TYPE mood",
        "+e{ok}",
        "CREATE TYPE mood AS ENUM ('ok')\nCREATE TABLE e (m mood)",
    ),
    Case("63", "CREATE TABLE n (id int); INSERT INTO n VALUES (1); DROP TABLE n", "+n{1}"),
    Case("64", "CREATE TABLE n AS SELECT i FROM generate_series(1, 2) i", "+n{1} +n{2}"),
    Case("65", "TRUNCATE t; INSERT INTO t VALUES (2, 'b')", "T(t) +t{2,b}", ONE),
    Case(
        "66 67",
        """INSERT INTO e VALUES ('ok')
        ALTER TYPE mood ADD VALUE 'bad'
        INSERT INTO e VALUES ('bad')
        ALTER TYPE mood RENAME VALUE 'bad' TO 'sad'
        INSERT INTO e VALUES ('sad')""",
        # A value is its label at the time of the change: the WAL holds its number, decoded with the catalogue of then.
        "+e{ok} | +e{bad} | +e{sad}",
        "CREATE TYPE mood AS ENUM ('ok')\nCREATE TABLE e (m mood)",
    ),
    Case(
        "68",
        "INSERT INTO e VALUES ('ok')\nALTER TYPE mood RENAME TO humour\nINSERT INTO e VALUES ('ok')",
        "+e{ok} | +e{ok}",
        "CREATE TYPE mood AS ENUM ('ok')\nCREATE TABLE e (m mood)",
    ),
    Case(
        "71",
        "VACUUM FULL t\n"
        "CLUSTER t USING t_pkey\n"
        "CREATE MATERIALIZED VIEW mv AS SELECT 1\n"
        "REFRESH MATERIALIZED VIEW mv\n"
        "ALTER TABLE ul SET LOGGED",
        "",
        ONE + "CREATE UNLOGGED TABLE ul (id int)\nINSERT INTO ul VALUES (1)",
    ),
    Case(
        "72",
        "INSERT INTO ul VALUES (1)\nCREATE TEMP TABLE tmp (id int)\nINSERT INTO tmp VALUES (1)",
        "",
        "CREATE UNLOGGED TABLE ul (id int)",
    ),
    Case(
        "73", "INSERT INTO g VALUES (1)", "+g{1}", "CREATE TABLE g (id int, s int GENERATED ALWAYS AS (id * 2) STORED)"
    ),
    Case(
        "73",
        "INSERT INTO g VALUES (1)",
        "+g{1,2}",
        "CREATE TABLE g (id int, s int GENERATED ALWAYS AS (id * 2) STORED, w int GENERATED ALWAYS AS (3) VIRTUAL)",
        ALL + " WITH (publish_generated_columns = stored)",
        since=18,
    ),
    Case(
        "73",
        "INSERT INTO g VALUES (1)\n"
        "ALTER PUBLICATION p SET (publish_generated_columns = stored)\n"
        "INSERT INTO g VALUES (2)\n"
        "UPDATE g SET id = 3 WHERE id = 1",
        "+g{id:1} | +g{id:2,s:4} | ~g[K id:1]{id:3,s:6}",
        "CREATE TABLE g (id int PRIMARY KEY, s int GENERATED ALWAYS AS (id * 2) STORED)",
        since=18,
        names=True,
    ),
    Case(
        "74",
        "INSERT INTO g VALUES (1)",
        "+g{2}",
        "CREATE TABLE g (id int, s int GENERATED ALWAYS AS (id * 2) STORED)",
        "CREATE PUBLICATION p FOR TABLE g (s)",
        since=18,
    ),
    Case("76", "CREATE TABLE n (id int)\nINSERT INTO n VALUES (1)", "+n{1}"),
    Case(
        "76",
        "CREATE TABLE s1.n (id int)\n"
        "INSERT INTO s1.n VALUES (1)\n"
        "ALTER TABLE s1.n SET SCHEMA public\n"
        "INSERT INTO n VALUES (2)",
        "+s1.n{1}",
        "CREATE SCHEMA s1",
        "CREATE PUBLICATION p FOR TABLES IN SCHEMA s1",
        since=15,
    ),
    # D. Publications
    Case(
        "80",
        "INSERT INTO t VALUES (1, 'a')\n"
        "ALTER PUBLICATION p ADD TABLE t\n"
        "INSERT INTO t VALUES (2, 'b')\n"
        "ALTER PUBLICATION p DROP TABLE t\n"
        "INSERT INTO t VALUES (3, 'c')",
        "+t{2,b}",
        T + AB,
        "CREATE PUBLICATION p FOR TABLE a",
    ),
    Case(
        "80",
        "INSERT INTO t VALUES (1, 'a')\n"
        "ALTER PUBLICATION p SET (publish = 'insert')\n"
        "DELETE FROM t\n"
        "ALTER PUBLICATION p SET (publish = 'insert, delete')\n"
        "INSERT INTO t VALUES (2, 'b')\n"
        "DELETE FROM t",
        "+t{1,a} | +t{2,b} | -t[K 2]",
    ),
    Case(
        "80 82",
        "INSERT INTO t VALUES (1, 'a')\n"
        "ALTER PUBLICATION p SET TABLE t WHERE (id > 5)\n"
        "INSERT INTO t VALUES (2, 'b'), (7, 'c')\n"
        "ALTER PUBLICATION p SET TABLE t WHERE (id < 5)\n"
        "UPDATE t SET v = 'd'\n"
        "ALTER PUBLICATION p SET TABLE t\n"
        "INSERT INTO t VALUES (8, 'e')",
        "+t{1,a} | +t{7,c} | ~t{1,d} ~t{2,d} | +t{8,e}",
        publish="CREATE PUBLICATION p FOR TABLE t",
        since=15,
    ),
    Case(
        "80 83",
        "INSERT INTO d VALUES (2, 'x', 3)\n"
        "ALTER PUBLICATION p SET TABLE d (id, n)\n"
        "INSERT INTO d VALUES (3, 'x', 4)\n"
        "BEGIN\n"
        "INSERT INTO d VALUES (4, 'x', 5)\n"
        "ALTER PUBLICATION p SET TABLE d\n"
        "INSERT INTO d VALUES (5, 'x', 6)\n"
        "COMMIT\n"
        "INSERT INTO d VALUES (6, 'x', 7)",
        # The list that counts is the one of the change's own moment, also within a transaction.
        "+d{id:2,v:x,n:3} | +d{id:3,n:4} | +d{id:4,n:5} +d{id:5,v:x,n:6} | +d{id:6,v:x,n:7}",
        WIDE,
        "CREATE PUBLICATION p FOR TABLE d",
        since=15,
        names=True,
    ),
    Case(
        "80",
        "INSERT INTO t VALUES (1, 'a')\n"
        "ALTER PUBLICATION p ADD TABLES IN SCHEMA public\n"
        "INSERT INTO t VALUES (2, 'b')\n"
        "CREATE TABLE n (id int)\n"
        "INSERT INTO n VALUES (3)\n"
        "ALTER PUBLICATION p DROP TABLES IN SCHEMA public\n"
        "INSERT INTO t VALUES (4, 'd')\n"
        "INSERT INTO s1.t VALUES (5)",
        "+t{2,b} | +n{3} | +s1.t{5}",
        T + "CREATE SCHEMA s1\nCREATE TABLE s1.t (id int)",
        "CREATE PUBLICATION p FOR TABLES IN SCHEMA s1",
        since=15,
    ),
    Case(
        "81",
        "INSERT INTO t VALUES (2, 'b')\nUPDATE t SET v = 'c'\nDELETE FROM t\nTRUNCATE t",
        "+t{2,b}",
        ONE,
        ALL + " WITH (publish = 'insert')",
    ),
    Case(
        "82",
        "UPDATE t SET id = 20\nUPDATE t SET id = 2\nUPDATE t SET v = 'b'\nUPDATE t SET id = 30\nUPDATE t SET id = 31",
        "-t[K 1] | +t{2,a} | ~t{2,b} | -t[K 2]",
        ONE,
        "CREATE PUBLICATION p FOR TABLE t WHERE (id < 10)",
        since=15,
    ),
    Case(
        "83",
        "INSERT INTO d VALUES (2, 'x', 3)\nUPDATE d SET n = 2",
        "+d{2,3} | ~d{1,2} ~d{2,2}",
        WIDE,
        "CREATE PUBLICATION p FOR TABLE d (id, n)",
        since=15,
    ),
    Case(
        "84 86",
        "INSERT INTO t VALUES (1, 'a')",
        "+t{1,a}",
        publish='CREATE PUBLICATION p FOR TABLE t\nCREATE PUBLICATION "We,Ird" FOR ALL TABLES',
        options={"publications": 'p,"We,Ird"'},
    ),
    Case("88", "TRUNCATE a CASCADE", "T(a,b cascade)", AB),
    Case("89", "TRUNCATE a CASCADE", "T(a cascade)", AB, "CREATE PUBLICATION p FOR TABLE a"),
    Case("90", "TRUNCATE t RESTART IDENTITY", "T(t restart)"),
    Case("91", "TRUNCATE a, b, t", "T(a,b,t)", T + AB),
    Case(
        "92",
        "INSERT INTO r VALUES (1, 'a')\nUPDATE r SET id = 11\nUPDATE r SET v = 'b'",
        "+r1{1,a} | -r1[K 1] +r2{a,11} | ~r2{b,11}",
        PARTS,
    ),
    Case(
        "93 94",
        "INSERT INTO r VALUES (1, 'a')\nUPDATE r SET id = 11\nUPDATE r SET v = 'b'\nTRUNCATE r1\nTRUNCATE r",
        "+r{1,a} | -r[K 1] +r{11,a} | ~r{11,b} | T(r)",
        PARTS,
        ALL + " WITH (publish_via_partition_root)",
    ),
    Case(
        "95",
        "INSERT INTO r VALUES (11, 'a')\nALTER TABLE r DETACH PARTITION r2\nINSERT INTO r2 VALUES ('c', 12)",
        "+r{11,a} | +r2{c,12}",
        PARTS,
        ALL + " WITH (publish_via_partition_root)",
        since=15,
    ),
    Case(
        "95",
        "INSERT INTO r VALUES (11, 'a')\nALTER TABLE r DETACH PARTITION r2\nINSERT INTO r2 VALUES ('c', 12)",
        "+r{11,a} | +r{12,c}",
        PARTS,
        ALL + " WITH (publish_via_partition_root)",
        until=14,
    ),
    Case(
        "92 93",
        "INSERT INTO r VALUES (1, 'a')\n"
        "ALTER PUBLICATION p SET (publish_via_partition_root = true)\n"
        "INSERT INTO r VALUES (12, 'b')\n"
        "UPDATE r SET id = 2 WHERE id = 12\n"
        "ALTER PUBLICATION p SET (publish_via_partition_root = false)\n"
        "DELETE FROM r",
        "+r1{1,a} | +r{12,b} | -r[K 12] +r{2,b} | -r1[K 1] -r1[K 2]",
        PARTS,
    ),
    Case(
        "93",
        "CREATE TABLE r3 (v text, x int, id int PRIMARY KEY)\n"
        "INSERT INTO r3 VALUES ('a', 0, 21)\n"
        "ALTER TABLE r3 DROP x\n"
        "ALTER TABLE r ATTACH PARTITION r3 FOR VALUES FROM (20) TO (30)\n"
        "INSERT INTO r VALUES (22, 'b')\n"
        "INSERT INTO r3 VALUES ('c', 23)\n"
        "UPDATE r SET id = 3 WHERE id = 21",
        "+r3{a,0,21} | +r{22,b} | +r{23,c} | -r[K 21] +r{3,a}",
        PARTS,
        ALL + " WITH (publish_via_partition_root)",
        since=15,
    ),
    Case(
        "93",
        "CREATE TABLE r3 (v text, id int PRIMARY KEY)\n"
        "INSERT INTO r3 VALUES ('a', 21)\n"
        "ALTER TABLE r ATTACH PARTITION r3 FOR VALUES FROM (20) TO (30)\n"
        "INSERT INTO r VALUES (22, 'b')\n"
        "UPDATE r SET id = 3 WHERE id = 21",
        "+r3{a,21} | +r3{b,22} | -r3[K 21] +r{3,a}",
        PARTS,
        ALL + " WITH (publish_via_partition_root)",
        until=14,
    ),
    Case("94", "TRUNCATE r", "T(r1,r2)", PARTS),
    Case(
        "96",
        "INSERT INTO h VALUES (1, 'a', 2)\nINSERT INTO t VALUES (2, 'b')",
        "+h{1,a,2} | +t{2,b}",
        T + "CREATE TABLE h (w int) INHERITS (t)",
    ),
    # E. Messages, origins, two-phase
    Case(
        "97",
        "BEGIN\n"
        "INSERT INTO t VALUES (1, 'a')\n"
        "SELECT pg_logical_emit_message(true, 'x', 'hi')\n"
        "INSERT INTO t VALUES (2, 'b')\n"
        "COMMIT",
        "+t{1,a} M(x:hi) +t{2,b}",
    ),
    Case(
        "98",
        "BEGIN\n"
        "INSERT INTO t VALUES (1, 'a')\n"
        "SELECT pg_logical_emit_message(false, 'x', 'hi')\n"
        "ROLLBACK\n"
        "INSERT INTO t VALUES (2, 'b')",
        "M!(x:hi) | +t{2,b}",
    ),
    Case("99", r"SELECT pg_logical_emit_message(true, 'x', '\x00ff'::bytea)", "M(x:00ff)"),
    Case("100", "SELECT pg_logical_emit_message(true, 'x', 'hi')", "", options={"messages": "false"}),
    Case(
        "101",
        """SELECT pg_replication_origin_session_setup('o1')
        BEGIN
        SELECT pg_replication_origin_xact_setup('AB/CD', '2001-02-03 04:05:06Z')
        INSERT INTO t VALUES (1, 'a')
        COMMIT
        SELECT pg_replication_origin_session_reset()
        INSERT INTO t VALUES (2, 'b')""",
        "+t{1,a} | +t{2,b}",
        T + "SELECT pg_replication_origin_create('o1')",
    ),
    Case(
        "102",
        """SELECT pg_replication_origin_session_setup('o1')
        INSERT INTO t VALUES (1, 'a')
        SELECT pg_replication_origin_session_reset()
        INSERT INTO t VALUES (2, 'b')""",
        "+t{2,b}",
        T + "SELECT pg_replication_origin_create('o1')",
        since=16,
        options={"origin": "none"},
    ),
    Case(
        "103",
        "BEGIN\n"
        "INSERT INTO t VALUES (1, 'a')\n"
        "PREPARE TRANSACTION 'g'\n"
        "INSERT INTO t VALUES (2, 'b')\n"
        "COMMIT PREPARED 'g'",
        "+t{2,b} | +t{1,a}",
    ),
    Case("104", "BEGIN\nINSERT INTO t VALUES (1, 'a')\nPREPARE TRANSACTION 'g'\nROLLBACK PREPARED 'g'", ""),
]
